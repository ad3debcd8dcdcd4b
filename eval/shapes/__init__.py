"""The embedded world: scenes, pictures, captions, and the parser that reads the pixels back."""
