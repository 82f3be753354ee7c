"""Networks of the language models: Transformers over ids, over frames, and a parallel decoder (2209.03143, 2305.09636)."""
