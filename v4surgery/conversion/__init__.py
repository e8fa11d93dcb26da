"""Other layouts and formats of a checkpoint, as plans of slice or of its writer."""
