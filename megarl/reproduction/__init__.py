"""From a row of a published table to a score and a verdict, stage by stage. Torch-free."""
