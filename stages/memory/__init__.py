"""Host memory that holds weights, and the copies between it and a device."""
