"""`lathe bench train`: what the trainer costs beside a bare loop, and what encoding beforehand saves."""
