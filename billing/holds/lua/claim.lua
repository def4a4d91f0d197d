-- Take the right to fill a mirror that is cold.
-- KEYS: 1 fill token   ARGV: 1 token
-- Returns 1, or 0 while somebody else has it.
return claim(KEYS[1], ARGV[1], lineage())
