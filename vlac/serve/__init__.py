"""A policy as a server: one core, three protocols that existing clients speak, and what watches over it."""
