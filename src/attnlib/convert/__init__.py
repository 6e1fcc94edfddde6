"""Turning trained models into others: what a student learns from a teacher."""
