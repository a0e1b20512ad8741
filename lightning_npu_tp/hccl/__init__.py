"""Configuration of HCCL, the collective library of Ascend NPUs."""
