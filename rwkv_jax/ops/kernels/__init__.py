"""The recurrences of `ops` as fused kernels: the same functions, one file per operator and target."""
