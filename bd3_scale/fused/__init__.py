"""What stands between a layer's products: activation, residual and norm, heads, and the cross-entropy of a head."""
