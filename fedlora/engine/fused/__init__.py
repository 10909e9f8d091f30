"""Many clients' adapters trained in one forward of one frozen base model (m-LoRA's idea)."""

from fedlora.engine.fused.engine import Auto as Auto
from fedlora.engine.fused.engine import Fused as Fused
