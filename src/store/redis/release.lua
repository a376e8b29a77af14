-- Ends a claim without a record. ARGV: the claim free, how long to remember it and its lease, in ms, how to publish.
if gone then -- the claim may still be on its way: let it find the key taken
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
  return 1
end
if id_of(head) ~= id_of(ARGV[1]) or state == 'D' then return 0 end
if state == 'F' then return 1 end
-- A claim that names no attempt was given up before it ran, and is not counted.
if struct.unpack('>I4', ARGV[1], 21) == 0 then attempt = math.max(attempt - 1, 0) end
local life = tonumber(ARGV[2])
if remembered then life = math.max(life, retention) end
redis.call('SET', KEYS[1], with(head, 'F', attempt, life >= retention), 'PX', string.format('%.0f', life))
tell()
return 1
