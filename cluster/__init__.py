"""Where and when: Ray, and rented machines. Imports capture inside actors only, so that actor modules import fast."""
