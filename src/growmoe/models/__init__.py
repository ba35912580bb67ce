"""What a model is: one decoder for dense and mixture-of-experts models, on one device."""
