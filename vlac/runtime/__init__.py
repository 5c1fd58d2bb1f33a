"""What a robot needs: pixels, state, prompt, actions, session."""
