"""SPP: factors that scale the weights of a pruned model and keep its zeros."""
