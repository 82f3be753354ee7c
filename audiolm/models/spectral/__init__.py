"""The spectral codec: mel frames around a quantizer, and phases found afterwards (in the spirit of 2406.05298)."""
