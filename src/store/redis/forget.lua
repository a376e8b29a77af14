-- Makes a key free. ARGV: '1' to force a live attempt out, how to publish.
if gone then return 'absent' end
local ttl = redis.call('PTTL', KEYS[1])
-- Without a deadline, which somebody has removed, nobody knows that the lease is over.
if state == 'R' and ARGV[1] ~= '1' and (ttl < 0 or ttl > retention) then return 'running' end
local forgotten = head:sub(1, 3) .. '\2' .. head:sub(5)
redis.call('SET', KEYS[1], with(forgotten, 'F', attempt, true), 'PX', string.format('%.0f', retention))
tell()
return 'forgotten'
