"""Generating, scoring and preparing experience."""
