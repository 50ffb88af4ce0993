"""Passes that let a query attend to fewer keys."""
