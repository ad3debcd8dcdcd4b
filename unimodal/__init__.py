"""One model that sees and draws: merge, processor, chat, generation, serving."""
