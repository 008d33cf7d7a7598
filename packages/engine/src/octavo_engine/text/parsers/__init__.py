"""What a model's text holds beside an answer: reasoning and tool calls, found in the text as it comes."""
