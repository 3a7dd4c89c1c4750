"""Runners carry out a plan: inline in the driver, or on Ray actors. Both are driven by omni.flow."""
