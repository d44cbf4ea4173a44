"""Fourfold."""
