"""Turn pretrained transformers into long-convolution models, a few layers at a time, and record what it costs."""
