-- Enlarge a hold by an amount, if the wallet has it.
-- KEYS: 1 mirror   ARGV: 1 call  2 more  3 -more
-- Returns 'extended', 'insufficient_funds', 'wallet_frozen', or 'missing' when Redis has lost the hold.
local state = redis.call('HMGET', KEYS[1], 'available', 'frozen', 'hold:' .. ARGV[1])
if not state[1] or not state[3] then return 'missing' end
if state[2] == '1' then return 'wallet_frozen' end
if redis.call('HINCRBY', KEYS[1], 'available', ARGV[3]) < 0 then
    redis.call('HINCRBY', KEYS[1], 'available', ARGV[2])
    return 'insufficient_funds'
end
redis.call('HINCRBY', KEYS[1], 'hold:' .. ARGV[1], ARGV[2])
return 'extended'
