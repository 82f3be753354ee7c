"""The spectral codec: log-mel frames around a quantizer, and phases found afterwards (in the spirit of 2406.05298)."""
