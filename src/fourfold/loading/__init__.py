"""Loading with transformers: configuration, quantizer, streaming converters; all by its own registries."""
