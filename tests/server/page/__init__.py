"""A package, so that its fixtures end with it: no async test can run beside the event loop of Playwright."""
