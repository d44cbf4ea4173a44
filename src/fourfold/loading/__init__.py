"""Loading with transformers: configuration, quantizer, streaming converters, all through its own registries."""
