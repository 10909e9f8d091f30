"""Updates of chosen coordinates of the base weights (the first stage of SLoRA)."""
