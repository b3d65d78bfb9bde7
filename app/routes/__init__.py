"""One thin file a resource: validate, await the engine, respond. No torch here."""
