-- Make a wallet's mirror from a snapshot of Postgres, only if absent and only if nothing touched it since the snapshot
-- was asked for: whoever releases, credits or renews on a cold wallet deletes the token.
-- KEYS: 1 mirror  2 fill token
-- ARGV: 1 token  2 available  3 frozen ('0' or '1')  4 ttl ms  5… call, hold, …
-- Returns 1 if the mirror was made.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'available', ARGV[2], 'frozen', ARGV[3])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], 'hold:' .. ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
