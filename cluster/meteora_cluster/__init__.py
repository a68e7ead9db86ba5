"""Groups of Ray actors that form one world: where they are placed, how they start, are watched and end."""
