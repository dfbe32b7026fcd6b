"""Boards: cards, cost models, and measuring."""
