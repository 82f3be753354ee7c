"""AudioLM (Borsos et al., 2209.03143) as a distributed workflow: raw audio in, generated audio out."""

__version__ = "0.1.0"
