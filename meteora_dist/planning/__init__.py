"""What a mesh of ranks must hold and send: arithmetic over shapes, without torch and without loading anything."""
