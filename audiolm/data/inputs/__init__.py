"""What a corpus source may be: folders, tables and containers of sounds, listed without decoding any."""
