"""What flows through memdb: frozen dataclasses and the rules they obey. numpy and the standard library only."""
