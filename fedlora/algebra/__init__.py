"""The linear algebra of low-rank updates, as pure functions of tensors."""
