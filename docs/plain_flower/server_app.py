"""Anybody's ServerApp: a strategy of fedlora over clients of unequal rank."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from strategies.flexlora import FlexLoRA

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    lora = LoraConfig(r=int(config["largest-rank"]), lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(config["model"]), lora)
    start = ArrayRecord(get_peft_model_state_dict(model))
    told = ConfigRecord({"lora_alpha": 16.0})
    result = FlexLoRA().start(grid, start, num_rounds=int(config["rounds"]), train_config=told)
    print(result.train_metrics_clientapp, result.evaluate_metrics_clientapp)
