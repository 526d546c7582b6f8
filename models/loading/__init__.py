"""From ``model.*`` to a module in memory."""
