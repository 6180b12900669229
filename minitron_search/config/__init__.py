"""The one configuration: its types, its sections and their checks, and how it is loaded."""
