"""Parts that the networks are composed of."""
