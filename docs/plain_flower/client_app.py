"""A client without fedlora. Its node: 'rank=8 model="/models/base" records="/data/a.jsonl"'."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

app = ClientApp()


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    node = context.node_config
    lora = LoraConfig(r=int(node["rank"]), lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(node["model"]), lora)
    sent = {name: torch.tensor(array.numpy()) for name, array in message.content["arrays"].items()}
    own = {k: t[: lora.r] if ".lora_A." in k else t[:, : lora.r] for k, t in sent.items()}
    set_peft_model_state_dict(model, own)  # the first start is the largest rank's: cut to ours
    tokenizer = AutoTokenizer.from_pretrained(node["model"])
    rows = map(json.loads, Path(node["records"]).read_text().splitlines())
    texts = [f"{r['instruction']}\n{r['output']}" for r in rows]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        if message.metadata.message_type == "train":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics = MetricRecord({"num-examples": len(texts), "loss": sum(losses) / len(losses)})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
