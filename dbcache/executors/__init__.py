"""How the steps of a lane are carried out: eagerly, one host read per dynamic step."""
