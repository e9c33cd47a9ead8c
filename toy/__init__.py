"""The toy world: scenes, tiny backbones, the report of a run."""
