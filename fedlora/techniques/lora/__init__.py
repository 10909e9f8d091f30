"""LoRA: low-rank factors beside frozen linear layers.

payload        the factors of all layers, as they travel
layer          one linear layer
technique      how a client trains them
self_pruning   how it gives up ranks (HeteroLoRA)
peft           factors on disk, in PEFT's format
"""
