-- Writes the deadline of a claim's key again, so that the connection has a write to wait for. ARGV: the claim id.
if redis.call('GETRANGE', KEYS[1], 4, 19) ~= ARGV[1] then return 0 end
local ttl = redis.call('PTTL', KEYS[1])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
return 1
