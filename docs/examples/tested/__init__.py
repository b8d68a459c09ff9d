"""An application and its tests: `pytest docs/examples/tested`."""
