-- A sign of life: renew a hold's lease, note what is known of its answer, put back what a flush took.
-- KEYS: 1 mirror  2 fill token  3 leases  4 call notes  5 key calls in flight
-- ARGV: 1 call  2 lease member  3 amount  4 -amount  5 lease ms  6 notes ttl ms  7 calls in flight max  8… note, value, …
-- Returns 'renewed', 'restored', or 'cold' (no mirror: the fill under way is stopped, as it may not know of this hold).
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZADD', KEYS[3], now_ms + ARGV[5], ARGV[2])
if tonumber(ARGV[7]) > 0 then redis.call('ZADD', KEYS[5], now_ms + ARGV[5], ARGV[1]) end
if #ARGV > 7 then
    for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1]) end
    redis.call('PEXPIRE', KEYS[4], ARGV[6])
end
local state = redis.call('HMGET', KEYS[1], 'available', 'hold:' .. ARGV[1])
if not state[1] then
    redis.call('DEL', KEYS[2])
    return 'cold'
end
if state[2] then return 'renewed' end
redis.call('HINCRBY', KEYS[1], 'available', ARGV[4]) -- may go below zero: the money was admitted before the flush
redis.call('HSET', KEYS[1], 'hold:' .. ARGV[1], ARGV[3])
return 'restored'
