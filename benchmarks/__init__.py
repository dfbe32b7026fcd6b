"""Measurements that back the claims of the README: each writes JSON and Markdown."""
