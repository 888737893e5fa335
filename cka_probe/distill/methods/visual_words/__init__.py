"""Methods whose student predicts bags of visual words."""
