"""Networks that come inside packages: their weights alone are used."""
